"""Former names of settings, methods, metrics and values, so that an old configuration is told the new ones."""

from __future__ import annotations

from collections.abc import Collection

# old name -> its new name; several where settings of different tables had one name
RENAMED: dict[str, tuple[str, ...]] = {
    # sections and settings of a build
    "calib": ("calibration",),
    "more_teachers": ("extra_teachers",),
    "outputs": ("num_classes",),
    "trust": ("allow_pickle",),
    "with_validation": ("train_on_validation",),
    "labelled_share": ("labelled_fraction",),
    "scale": ("normalize",),
    "checked": ("verify_images",),
    "rivals": ("variants",),
    "valid": ("valid_fraction",),
    "warmup": ("warmup_fraction",),
    # quantize
    "floats": ("keep_float",),
    "equalize": ("cross_layer_equalization",),
    "smooth": ("smoothquant_alpha",),
    "correct_bias": ("bias_correction",),
    # bench and gates
    "blocks": ("rounds",),
    "calls": ("calls_per_round",),
    "sessions": ("processes",),
    "copies": ("end_to_end",),
    "model": ("inference_only",),
    "preprocessing": ("with_preprocessing",),
    "cold": ("cold_start",),
    "measure": ("metric",),
    "at_most": ("max",),
    "at_least": ("min",),
    "drop": ("accuracy_drop",),
    "teacher_drop": ("accuracy_drop_vs_teacher",),
    "deviation": ("mae_vs_fp32",),
    "p90_at_most_ms": ("p90_upper_ms",),
    "p99_at_most_ms": ("p99_upper_ms",),
    # methods
    "alone": ("supervised",),
    "angle": ("angle_weight",),
    "attention": ("attention_weight",),
    "candidates": ("num_candidates",),
    "dictionary": ("dictionary_fraction",),
    "distance": ("distance_weight",),
    "early": ("warmup_fraction",),
    "finish": ("finish_fraction",),
    "full": ("full_fraction",),
    "goal": ("target_accuracy",),
    "head": ("head_fraction",),
    "hint": ("hint_weight",),
    "hints": ("hint_weight",),
    "image": ("image_weight",),
    "initialise": ("initialise_fraction",),
    "inter": ("inter_weight",),
    "intra": ("intra_weight",),
    "keep": ("num_routes",),
    "labels": ("ce_weight",),
    "logits": ("kd_weight",),
    "negative": ("negative_weight",),
    "others": ("beta",),
    "pixel": ("pixel_weight",),
    "projection_decay": ("projection_weight_decay",),
    "rate": ("code_fraction",),
    "raw": ("raw_logits",),
    "reentry": ("stage1_replay",),
    "sampled": ("subnets_per_step",),
    "search": ("search_fraction",),
    "share": ("assistants_fraction", "blocks_fraction", "subnet_weight", "qat_fraction"),
    "stage1": ("stage1_fraction",),
    "stages": ("num_stages",),
    "standardise": ("standardize_logits",),
    "start": ("start_fraction", "lr_start", "stage2_lr_start"),
    "step": ("step_macs_fraction",),
    "steps": ("num_steps",),
    "structure": ("structure_weight",),
    "subnets": ("num_subnets",),
    "taps": ("num_pairs",),
    "target": ("alpha",),
    "teacher": ("teacher_weight",),
    "trial": ("trial_fraction",),
    "weigh": ("gate_fraction",),
    "weight": ("projection_weight", "attention_weight", "similarity_weight", "kd_weight"),
}


def new_name(name: str, names: Collection[str]) -> str:
    """Return what a former name is called now, if that is among `names`; empty if not."""
    return next((new for new in RENAMED.get(name, ()) if new in names), "")
