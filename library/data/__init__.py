"""Files to batches: folders, captions, buckets, order, images, latent cache, loader. Encoders come as callables."""
