"""The one adapter to Megatron-Core: config translation and version differences."""
