"""What can be fused: matchers propose by structure, and `probe` lets through what computes the same."""
