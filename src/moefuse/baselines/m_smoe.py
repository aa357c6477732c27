"""M-SMoE: merge the experts that tokens seldom choose into those they choose often.

Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy"
(2023), section 3.1, without the low-rank compression of MC-SMoE that follows it there:

1. the dominant experts are those that most tokens chose;
2. every other expert joins the dominant one with the most similar router logits, by the cosine of
   the two experts' logits over calibration tokens;
3. a member's neurons are put in the order of the dominant expert's, by matching weights;
4. a group becomes the mean of its members' weights, weighed by how often each was chosen.

The router stays. Not as in the paper: it ranks the experts of all layers together, so that layers
keep unequal numbers; here a layer's budget is given. It aligns all experts before it forms groups,
which comes to the same thing, and matches permutations only, where here a neuron's up row and down
column may change sign together.

Shape suffixes: T tokens, E experts.
"""

import torch
from torch import Tensor, nn

from moefuse.baselines import Layer
from moefuse.baselines._merging import merge_into_centres
from moefuse.baselines._routing import router_logits
from moefuse.mathematics.alignment import ExpertWeights, align
from moefuse.mathematics.clustering import join_centres, strongest
from moefuse.mathematics.similarity import output_affinity


@torch.no_grad()
def compress(layer: Layer, numbers: int) -> nn.Module:
    """Merge the layer's experts into as many as ``numbers`` hold.

    Raises ``TooSmallError`` where they hold none.
    """
    dominant = strongest(layer.statistics.count_E, layer.experts_within(numbers))
    logits_TE = router_logits(layer, layer.call.x_TD).cpu()
    group_E = join_centres(output_affinity(logits_TE.T), dominant)
    # An expert that was never chosen still counts a little, so that no group is empty of weight.
    weight_E = layer.statistics.count_E.clamp_min(1e-6)

    def aligned(centre: int, member: int) -> ExpertWeights:
        return align(layer.experts.weights(centre), layer.experts.weights(member))

    return merge_into_centres(layer, _centres(group_E, dominant), weight_E, aligned)


def _centres(group_E: Tensor, dominant: Tensor) -> Tensor:
    dominant_of_group = torch.empty_like(dominant)
    dominant_of_group[group_E[dominant]] = dominant
    return dominant_of_group[group_E]
