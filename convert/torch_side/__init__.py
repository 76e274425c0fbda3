"""What an export ships: IMAE models for transformers, in PyTorch. No file here imports imae_jax."""
