"""Files to batches: folders, captions, buckets, order, pictures, latent cache, loader. Encoders come as callables."""
