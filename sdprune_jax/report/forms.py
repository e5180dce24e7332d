"""The forms of the files that a report reads of a run, as the stages before write them.

A type, [of every item], {key: of its value}; "*" is any key, and one that ends in "?" may be
missing.
"""

_NUMBER = (int, float)
_LAYER = {"name": str, "shape": [int], "weights": int, "zeros": int, "threshold": _NUMBER}
_COMPONENT = {
    **dict.fromkeys(("scope", "threshold"), str),
    **dict.fromkeys(("requested", "of_prunable", "of_component", "of_pipeline"), _NUMBER),
    **dict.fromkeys(("parameters", "prunable", "zeros", "underflow_zeros", "zeros_before?"), int),
    "layers": [_LAYER],
    "histogram": {"edges": [_NUMBER], "dense": [int], "pruned": [int]},
}
_PRUNE = {
    **dict.fromkeys(("model", "directory", "save_dtype"), str),
    "seconds": {"*": _NUMBER},
    "pipeline_parameters": int,
    "of_pipeline": _NUMBER,
    "bytes": dict.fromkeys(("dense", "pruned", "dense_gzip", "pruned_gzip"), int),
    "components": {"*": _COMPONENT},
}
_MODEL = {
    "files": [str],
    **dict.fromkeys(("seconds", "first_batch_seconds?", "seconds_per_image?"), _NUMBER),
    "scores": {"*": _NUMBER},
    "found": [bool],
    "psnr_to_dense?": [_NUMBER],
    "expert?": [int],
}
_IMAGES = {"protocol": {}, "prompts": [str], "models": {"*": _MODEL}, "chance": {"*": _NUMBER}}
_EVALUATION = {
    "protocol": {
        **dict.fromkeys(("name", "source", "remarks"), str),
        **dict.fromkeys(("num_images", "evaluated"), int),
    },
    "models": {"*": {"figures": {"*": {"value": _NUMBER, "low?": _NUMBER, "high?": _NUMBER}}}},
}
_FIGURES = {"*": {"value": _NUMBER, "low?": _NUMBER, "high?": _NUMBER}}
_SWEEP = {
    "agreement": str,
    "prompts": [str],
    "protocol": {"name": str, "evaluated": int},
    "dense": [{"seed": int, "images": str, "figures": _FIGURES, "chance": {"*": _NUMBER}}],
    "rows": [
        {
            "seed": int,
            "zeros": int,
            **dict.fromkeys(("nominal", "true"), _NUMBER),
            "components": {"*": {"method": str, "scope?": str, "sparsity": _NUMBER}},
            "figures": _FIGURES,
            **dict.fromkeys(("images?", "failed?"), str),
        }
    ],
    "cliffs": [
        {
            **dict.fromkeys(("component", "method", "criterion", "why_not?"), str),
            **dict.fromkeys(("limit", "whole?", "broken?"), _NUMBER),
        }
    ],
}
_EXPERTS = {
    "mac_counter": str,
    "latent_size": [int],
    "dense": {"macs": _NUMBER, "parameters": int, "units?": {"*": int}},
    "experts": [
        {
            "directory": str,
            **dict.fromkeys(("macs", "share_of_macs", "share_of_parameters"), _NUMBER),
            "parameters": int,
            "prompts": {"*": int},
            "kept": {"*": int},
        }
    ],
}
_ASSIGNED = {
    **dict.fromkeys(("macs_budget", "units_that_differ"), _NUMBER),
    "macs_of_experts": [_NUMBER],
    "splits": {
        "*": {
            "prompts": [int],
            "dead": [int],
            "macs_over_budget": _NUMBER,
            **dict.fromkeys(("largest_share", "smallest_share", "macs"), _NUMBER),
            **dict.fromkeys(("information_style?", "information_style_shuffled?"), _NUMBER),
            **dict.fromkeys(("information_group?", "information_group_shuffled?"), _NUMBER),
        }
    },
}
_FINETUNED = {
    "skipped": [str],
    "experts": [{"directory": str, "before": {"*": _NUMBER}, "after": {"*": _NUMBER}}],
}
FORMS = {
    "prune.json": _PRUNE,
    "images/generate.json": _IMAGES,
    "evaluate.json": _EVALUATION,
    "sweep.json": _SWEEP,
    "config.json": {},
    "experts/experts.json": _EXPERTS,
    "assign/assign.json": _ASSIGNED,
    "finetuned/finetune.json": _FINETUNED,
}
