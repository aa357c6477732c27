"""What the teacher's MoE layers receive, choose and return on calibration text."""
