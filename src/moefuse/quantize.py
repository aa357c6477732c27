"""Quantise: a student whose linear layers are stored by an engine's own quantiser.

What is rounded are the shared bases, plain linear layers, and on request attention, shared experts
and layers without experts; router, norms, embeddings and head stay as they are. With text, errors
count as they come out on it: every base sees all tokens that chose any of its members; and layers
of few bits then learn to return what they returned before (``distillation.rounded``).
"""

import shutil
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefuse import artifacts, corpus
from moefuse.calibration.collect import CalibrationStore, collect
from moefuse.checkpoint.formats.base import quantization_method
from moefuse.checkpoint.headers import CARD, CONFIG, read_config
from moefuse.checkpoint.streaming import StreamedTeacher
from moefuse.checkpoint.writer import ShardedWriter
from moefuse.config import DistillConfig, QuantizeConfig, build, parse_bytes
from moefuse.console import track
from moefuse.devices import choose_device
from moefuse.distillation.loop import DistillResult
from moefuse.distillation.predictions import SEQUENCES
from moefuse.distillation.rounded import LearntRounding, refit_layer
from moefuse.errors import UserError
from moefuse.evaluation.loading import load_tokenizer
from moefuse.export.quantized import compressed, libraries
from moefuse.export.quantized.card import quantized_card
from moefuse.export.quantized.deltas import (
    PLAIN_BITS,
    bits_of,
    code_deltas,
    learning,
    with_stored_kinds,
)
from moefuse.export.quantized.layers import BASES, chosen, linear_layers
from moefuse.export.quantized.result import Predictions, QuantizeResult, Refit, Seen
from moefuse.export.quantized.schemes import (
    AWQ,
    CALIBRATED,
    GPTQ,
    REFITTED,
    check_group_size,
    check_scheme,
    check_text,
    whole_codes,
)
from moefuse.export.quantized.sparing import scale_neurons
from moefuse.export.student_reader import StudentReader
from moefuse.mathematics.activation_aware import input_scales
from moefuse.mathematics.expert_moments import input_moments
from moefuse.mathematics.experts import Experts
from moefuse.mathematics.integers import Grid, Rounded, nearest, with_feedback
from moefuse.modeling import TRAVELLING_FILE
from moefuse.modeling.modeling_moefuse import FusedExperts, gating_of
from moefuse.places import check_output, check_outside, check_own, size_of
from moefuse.quantize_predictions import WholeStudent

OWN_ENTRIES = ("quantize-",)
REFIT = DistillConfig(
    batch_tokens=2048,
    delta_learning_rate=5e-4,
    scale_learning_rate=5e-4,
    code_learning_rate=5e-3,
)
"""How layers learn to make up for rounding; measured in docs/research.md, section 17."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's experts' inputs, ``x_EDD`` and ``z_EFF``; tokens ``count_E``."""

    x_EDD: Tensor
    z_EFF: Tensor
    count_E: Tensor

    def of(self, projection: str) -> Tensor:
        """Return those of the inputs of ``gate_up_proj`` or of ``down_proj``."""
        return self.x_EDD if projection == "gate_up_proj" else self.z_EFF

    def of_group(self, projection: str, members: Tensor) -> Tensor:
        """Return the sum over a group's members, each by its tokens."""
        return torch.einsum(
            "e,eij->ij", self.count_E[members].float(), self.of(projection)[members]
        )


def quantize(
    student: str | Path, out: str | Path, values: dict[str, Any], *, overwrite: bool = False
) -> QuantizeResult:
    """Write the fused checkpoint ``student`` to ``out``, its linear layers by a quantiser's format.

    ``values`` are settings of ``QuantizeConfig``. Raises ``UserError`` before any work.
    """
    student, out = Path(student), Path(out)
    job = _Job(student, out, build(QuantizeConfig, values), overwrite=overwrite)
    return job.run()


class _Job:
    def __init__(self, student: Path, out: Path, options: QuantizeConfig, *, overwrite: bool):
        self.out, self.options, self.scheme = out, options, options.scheme
        check_scheme(self.scheme)
        check_text(self.scheme, options.data)
        check_group_size(self.scheme, options.group_size)
        self._check_learning()
        check_output(out, overwrite=overwrite)
        self.reader = StudentReader.of(student)
        check_outside(out, self.reader.directory, "output")
        if any(plan.neurons is not None for plan in self.reader.plans.values()):
            raise UserError(
                f"{student} keeps neurons of each expert's own, already in few bits, and has "
                "no bases that a quantiser could take; fuse with --groups for that."
            )
        method = quantization_method(read_config(self.reader.directory))
        if method is not None:
            raise UserError(
                f"{student} is quantised already ({method}), and would be rounded twice; give the "
                "student that it was made of."
            )
        self.max_shard_bytes = parse_bytes(options.max_shard, "--max-shard")
        self.kinds = linear_layers(self.reader)
        self.names = chosen(self.kinds, options.what)
        self.rounds_bases = any(self.kinds[name] == BASES for name in self.names)
        self.delta_bits = bits_of(options.delta_bits, self.reader.plans.values())
        self.own = self._own_parts()
        self.refits = self._refits()
        self.grid = self._grid()
        self.device = choose_device(options.device)
        self.teacher = StreamedTeacher(self.reader, device=self.device, dtype=torch.float32)
        self.work = out.with_name(out.name + ".work")
        check_own(self.work, OWN_ENTRIES)
        self.tokens: list[tuple[Tensor, Tensor]] = [] if options.data is None else self._text()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.rounded: dict[str, Rounded] = {}
        self.wanted: dict[str, Tensor] = {}
        self.stored_bytes: dict[str, int] = {}
        self.delta_bytes = 0
        self.refitted: list[DistillResult] = []
        self.predictions: Predictions | None = None

    def _grid(self) -> Grid | None:
        """Return the grid that bases are rounded to; None where a library's is its own."""
        widths = {self.reader.tensors[f"{name}.weight"].shape[1] for name in self.names}
        if self.scheme not in compressed.LAYOUTS:
            libraries.check(self.scheme, widths)
        layout = compressed.LAYOUTS.get(self.scheme, libraries.LAYOUTS.get(self.scheme))
        if layout is None:
            return None
        return compressed.grid_of(layout, widths, self.options.group_size)

    def _check_learning(self) -> None:
        """Raise ``UserError`` for settings of learning that do not go together."""
        options = self.options
        if options.refit and options.data is None:
            raise UserError(
                "--refit lets a layer learn from text what rounding lost; say with --data which."
            )
        if options.prediction_steps and options.data is None:
            raise UserError("--prediction-steps teach by text; say with --data which.")
        if options.prediction_steps and self.scheme not in compressed.LAYOUTS:
            raise UserError(
                f"--prediction-steps are for schemes that moefuse rounds itself "
                f"({', '.join(compressed.LAYOUTS)}), not for {self.scheme}."
            )

    def _own_parts(self) -> str:
        """Return words for what experts have of their own and can learn; "" for nothing."""
        plans = self.reader.plans.values()
        parts = {
            "deltas": any(plan.rank for plan in plans),
            "scales": any(plan.scale for plan in plans),
            "biases": self.reader.shape.biased or any(plan.bias for plan in plans),
        }
        *first, last = [part for part, there in parts.items() if there] or [""]
        return f"{', '.join(first)} and {last}" if first else last

    def _refits(self) -> bool:
        """Say whether layers learn to make up for rounding; raises ``UserError`` where none can."""
        options, what = self.options, f"--what {self.options.what}"
        if not self.rounds_bases and (options.refit or self.scheme in CALIBRATED):
            asked = "--refit" if options.refit else f"--scheme {self.scheme}"
            raise UserError(
                f"{asked} is for shared bases, and {what} leaves them as they are; add bases"
                f"{'' if options.refit else ', or use w4a16'}."
            )
        if options.prediction_steps and not self.own:
            raise UserError(
                "--prediction-steps teach deltas, scales and biases, and this student has none."
            )
        able = bool(self.own) or whole_codes(self.scheme)
        if options.refit and not able:
            raise UserError(
                f"--refit has nothing to teach: the student has no deltas, scales or biases, and "
                f"bases stay as {self.scheme} rounds them."
            )
        wished = options.data is not None and self.scheme in REFITTED and self.rounds_bases and able
        return wished if options.refit is None else options.refit

    def _text(self) -> list[tuple[Tensor, Tensor]]:
        options = self.options
        return corpus.read_batches(
            str(options.data),
            load_tokenizer(self.reader.directory),
            sequence_length=options.sequence_length,
            tokens=options.tokens,
            batch_size=options.batch_size,
            vocabulary=self.reader.config["vocab_size"],
            source=self.reader.source,
        )

    @property
    def _learns_of_bases(self) -> bool:
        """Whether what reaches the experts on the text is of use."""
        return bool(self.tokens) and self.rounds_bases

    def run(self) -> QuantizeResult:
        if self.work.exists():
            shutil.rmtree(self.work)
        store = CalibrationStore(self.work / "quantize-calibration")
        try:
            if self._learns_of_bases:
                collect(self.teacher, self.tokens, store)
            return self._write(store)
        finally:
            if self.work.exists():
                shutil.rmtree(self.work)

    # What is stored.

    def _write(self, store: CalibrationStore) -> QuantizeResult:
        partial = artifacts.partial_directory(self.out)
        if self.scheme in libraries.SCHEMES:
            settings = self._write_by_library(partial, store)
        else:
            assert self.grid is not None
            layout = compressed.LAYOUTS[self.scheme]
            tensors = self._tensors(store)
            if self.options.prediction_steps:
                tensors = self._predicting(dict(tensors))
            with ShardedWriter(partial, self.max_shard_bytes) as writer:
                for name, tensor in tensors:
                    writer.add(name, tensor)
            stay = [name for name in self.kinds if name not in set(self.names)]
            settings = compressed.settings(layout, self.grid, stay)
        self.reader.copy_auxiliary_files(partial)
        shutil.copyfile(TRAVELLING_FILE, partial / TRAVELLING_FILE.name)
        config = with_stored_kinds(
            read_config(self.reader.directory), self.reader.plans, self.delta_bits
        )
        config["quantization_config"] = settings
        artifacts.write_json(partial / CONFIG, config)
        result = self._result(size_of(partial))
        artifacts.write_text(
            partial / CARD,
            quantized_card(self.out.name, self.reader, result),
        )
        artifacts.finish_directory(partial, self.out)
        return result

    def _write_by_library(self, partial: Path, store: CalibrationStore) -> dict[str, Any]:
        stay = [name for name in self.kinds if name not in set(self.names)]
        model = libraries.load(self.reader, self.scheme, stay, self.grid)
        for layer in track(self.reader.shape.layers, "Quantise"):
            path = self.reader.family.experts_path(layer)
            given = self._module(layer)
            made: Any = model.get_submodule(path)
            self._moments(layer, given, store)
            rounded: dict[str, Tensor] = {}
            for name, linear in libraries.linears(made.get_submodule("bases")):
                if f"{path}.bases.{name}" in self.names:
                    rounded[f"bases.{name}"] = libraries.weight_of(linear)
            _, rest = self._refitted(layer, given, rounded, store)
            self.delta_bytes += code_deltas(made, self.delta_bits)
            made.load_state_dict(rest, strict=False)
        self.stored_bytes = libraries.stored(model, self.names)
        return libraries.save(model, partial, self.max_shard_bytes)

    def _tensors(self, store: CalibrationStore) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the quantised student by name, a layer in memory at a time."""
        reader, family = self.reader, self.reader.family
        for name in reader.outside_names():
            yield name, reader.read(name)
        for layer in track(range(family.layer_count(reader.config)), "Quantise"):
            prefix = family.layer_prefix(layer)
            for name, tensor in reader.read_layer(layer, experts=False).items():
                stem = (prefix + name).removesuffix(".weight")
                if stem in self.names:
                    yield from self._stored(stem, self._round(tensor, None))
                else:
                    yield prefix + name, tensor
            if layer in reader.shape.layers:
                yield from self._experts(layer, store)

    def _experts(self, layer: int, store: CalibrationStore) -> Iterator[tuple[str, Tensor]]:
        module = self._module(layer)
        path = f"{self.reader.family.experts_path(layer)}."
        moments = self._moments(layer, module, store)
        found: dict[str, Rounded] = {}
        spared = self._spared(module, moments)
        for group, base in enumerate(module.bases):
            members = (module.group_of_expert == group).nonzero().flatten()
            for projection, linear in base.named_children():
                name = f"bases.{group}.{projection}"
                if path + name not in self.names:
                    continue
                moment = None if moments is None else moments.of_group(projection, members)
                if moment is not None and projection == "down_proj" and group in spared:
                    moment = moment / torch.outer(spared[group], spared[group])
                weight: Any = linear.weight
                found[name] = self._round(weight.data, moment)
                self._will_learn(path + name, weight.data)
        learnt, rest = self._refitted(layer, module, found, store)
        self.delta_bytes += code_deltas(module, self.delta_bits)
        for name, base in learnt.items():
            found[name] = base.rounded()
            self._will_learn(path + name, base.wanted())
        for name, rounded in found.items():
            yield from self._stored(path + name, rounded)
        for name, tensor in {**module.state_dict(), **rest}.items():
            if path + name.removesuffix(".weight") not in self.names:
                yield path + name, tensor

    def _will_learn(self, name: str, wanted_OI: Tensor) -> None:
        """Keep the numbers that the base ``name`` was rounded from, if predictions teach it."""
        if self.options.prediction_steps:
            self.wanted[name] = wanted_OI

    def _spared(self, module: FusedExperts, moments: Moments | None) -> dict[int, Tensor]:
        """Enlarge what must be rounded well of every base's down projection, as AWQ does.

        Returns by group what its columns were multiplied with, (F,); ``module`` is changed.
        """
        gating: Any = module.gating
        if self.scheme != AWQ or moments is None or not gating.linear_in_up:
            return {}
        assert self.grid is not None
        found: dict[int, Tensor] = {}
        for group, base in enumerate(module.bases):
            members = (module.group_of_expert == group).nonzero().flatten()
            moment_FF = moments.of_group("down_proj", members)
            down: Any = base.get_submodule("down_proj")
            weight_DF = down.weight.detach()
            found[group] = input_scales(weight_DF, self.grid, weight_DF.dtype, moment_FF)
            scale_neurons(module, group, found[group])
        return found

    def _stored(self, name: str, rounded: Rounded) -> Iterator[tuple[str, Tensor]]:
        if self.options.prediction_steps:
            self.rounded[name] = rounded
        stored = compressed.parts(name, rounded, compressed.LAYOUTS[self.scheme])
        self.stored_bytes[name] = sum(tensor.nbytes for tensor in stored.values())
        yield from stored.items()

    def _round(self, weight_OI: Tensor, moment_II: Tensor | None) -> Rounded:
        assert self.grid is not None
        if self.scheme == GPTQ and moment_II is not None:
            return with_feedback(weight_OI, self.grid, weight_OI.dtype, moment_II)
        energy_I = None if moment_II is None else moment_II.diagonal()
        search = self.options.scales == "search"
        return nearest(weight_OI, self.grid, weight_OI.dtype, search=search, energy_I=energy_I)

    # Making up for rounding.

    def _refitted(
        self,
        layer: int,
        module: FusedExperts,
        rounded: dict[str, Rounded] | dict[str, Tensor],
        store: CalibrationStore,
    ) -> tuple[dict[str, LearntRounding], dict[str, Tensor]]:
        """Return a layer's bases and the rest of it as it learnt to make up for its rounding.

        ``rounded`` are its bases by names such as ``bases.3.down_proj``; those that are whole
        numbers here learn too.
        """
        if not (self.refits and rounded):
            return {}, {}
        whole = deepcopy(module).float().to(self.device)
        call = store.all_calls(layer).to(self.device)
        options = replace(REFIT, steps=self.options.steps)
        progress = partial(track, description=f"Refit layer {layer}")
        grid = self.grid if whole_codes(self.scheme) else None
        delta = None
        if self.delta_bits != PLAIN_BITS and whole.delta is not None:
            delta = learning(whole.delta, self.delta_bits, self.reader.dtype)
        bases, rest, result = refit_layer(
            whole, rounded, grid, call, options,
            delta=delta, seed=self.options.seed, progress=progress,
        )  # fmt: skip
        self.refitted.append(result)
        if delta is not None:
            module.delta = delta.packed().to("cpu", self.reader.dtype)
        dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
        return bases, {name: tensor.to(dtypes[name]) for name, tensor in rest.items()}

    def _predicting(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield ``tensors`` of the quantised student, some of them taught by predictions."""
        student = WholeStudent(
            self.reader, tensors, self.rounded, delta_bits=self.delta_bits, device=self.device
        )
        sequences = self._longest_sequences()
        some = sequences[:SEQUENCES]
        began = student.divergence(some)
        steps = self.options.prediction_steps
        grid = self.grid if whole_codes(self.scheme) else None
        changed, bases = student.learn(
            sequences, self.wanted, grid, steps=steps, seed=self.options.seed
        )
        for name, rounded in bases.items():
            changed |= dict(self._stored(name, rounded))
        taught = [self.own, "the codes of bases and their scales"] if bases else [self.own]
        self.predictions = Predictions(
            steps, " and ".join(taught), len(some), began, student.divergence(some)
        )
        yield from {**tensors, **changed}.items()

    def _longest_sequences(self) -> list[Tensor]:
        sequences = [
            ids_S[mask_S.bool()]
            for ids, mask in self.tokens
            for ids_S, mask_S in zip(ids, mask, strict=True)
        ]
        longest = max(map(len, sequences))
        return [ids_S for ids_S in sequences if len(ids_S) == longest]

    def _module(self, layer: int) -> FusedExperts:
        """Read a layer's fused experts, with what joins their gate and up."""
        module, family = self.reader.module(layer), self.reader.family
        assert isinstance(module, FusedExperts)
        native = self.teacher.layers[layer].get_submodule(
            f"{family.moe_name}.{family.experts_name}"
        )
        module.gating = gating_of(native, family.gating(self.reader.config))
        return module

    @torch.no_grad()
    def _moments(self, layer: int, module: FusedExperts, store: CalibrationStore) -> Moments | None:
        if not self._learns_of_bases:
            return None
        call = store.all_calls(layer)
        gate_up_EFD, down_EDF, biases = self.reader.written_out(module, device=self.device)
        count_E = torch.bincount(call.index_TK.flatten(), minlength=self.reader.shape.experts)
        gating: Any = module.gating
        experts = Experts(gate_up_EFD, down_EDF, gating, biases)
        group_TK = module.group_of_expert[call.index_TK.long()]
        groups = len(module.bases)
        reached = [int((group_TK == group).any(1).sum()) for group in range(groups)]
        self.seen.append((torch.tensor(reached), count_E))
        x_EDD, z_EFF = input_moments(call.to(self.device), experts)
        return Moments(x_EDD.cpu(), z_EFF.cpu(), count_E)

    # What comes of it.

    def _is_delta(self, name: str) -> bool:
        layer = self.reader.family.layer_of(name)
        return layer in self.reader.plans and name.startswith(
            f"{self.reader.family.experts_path(layer)}.delta."
        )

    def _result(self, written: int) -> QuantizeResult:
        reader, shape = self.reader, self.reader.shape
        paths = tuple(f"{reader.family.experts_path(layer)}." for layer in shape.layers)
        routed = {name: t for name, t in reader.tensors.items() if name.startswith(paths)}
        rounded = {f"{name}.weight" for name in self.names}
        as_before = sum(
            t.stored_bytes
            for name, t in routed.items()
            if name not in rounded and not self._is_delta(name)
        )
        bases = sum(self.stored_bytes[n] for n in self.names if self.kinds[n] == BASES)
        bits = 8 * (as_before + bases + self.delta_bytes)
        return QuantizeResult(
            out=self.out,
            scheme=self.scheme,
            what=self.options.what,
            bytes=written,
            student_bytes=size_of(reader.directory),
            delta_bits=self.delta_bits if self.delta_bytes else None,
            bits=bits / sum(t.numel for t in routed.values()),
            teacher_bits=bits / (len(shape.layers) * shape.layer_numbers),
            base_bits=8
            * sum(self.stored_bytes.values())
            / sum(reader.tensors[name].numel for name in rounded),
            tokens=sum(int(mask.sum()) for _, mask in self.tokens),
            weighed=self._learns_of_bases and self._rounds_by_text(),
            seen=self._seen(),
            refit=self._refit_result(),
            predictions=self.predictions,
        )

    def _rounds_by_text(self) -> bool:
        searched = whole_codes(self.scheme) and self.options.scales == "search"
        return searched or self.scheme in CALIBRATED

    def _refit_result(self) -> Refit | None:
        found = self.refitted
        if not found:
            return None
        rounding = ["which way each number is rounded"] if whole_codes(self.scheme) else []
        return Refit(
            steps=self.options.steps,
            learnt=", and ".join([self.own, *rounding] if self.own else rounding),
            layers=len(found),
            improved=sum(result.after < result.before for result in found),
            before=statistics.fmean(result.before for result in found),
            after=statistics.fmean(result.after for result in found),
        )

    def _seen(self) -> Seen | None:
        if not self.seen:
            return None
        bases = torch.cat([base_G for base_G, _ in self.seen]).tolist()
        experts = torch.cat([expert_E for _, expert_E in self.seen]).tolist()
        return Seen(statistics.median(bases), min(bases), statistics.median(experts), min(experts))
