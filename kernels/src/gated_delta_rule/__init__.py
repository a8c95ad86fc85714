"""The gated delta rule: linear attention with a state that decays and corrects itself."""
