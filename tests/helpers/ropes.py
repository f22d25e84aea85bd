"""`rope_parameters` of every supported type of rotation."""

ORIGINAL = {"original_max_position_embeddings": 64}
FACTORS = {
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "yarn": {"factor": 4.0, **ORIGINAL},
    "yarn-mscale": {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.1, **ORIGINAL},
    "yarn-betas": {"factor": 4.0, "beta_fast": 8, "beta_slow": 2, "truncate": False, **ORIGINAL},
    "longrope": {"factor": 4.0, **FACTORS, **ORIGINAL},
    "longrope-scaled": {"attention_factor": 1.3, **FACTORS, **ORIGINAL},
}


def rope_parameters(name: str) -> dict:
    """The parameters of a type, or of a variant of it."""
    return {"rope_type": name.split("-")[0], "rope_theta": 5000.0, **ROPES[name]}
