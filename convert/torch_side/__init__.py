"""PyTorch: what an export ships, and what runs it to verify it. No file here imports jax or imae_jax."""
