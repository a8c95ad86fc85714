"""A commit-marked store around megatron.core.dist_checkpointing."""
