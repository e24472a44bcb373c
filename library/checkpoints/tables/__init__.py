"""Names of tensors in the original and in the diffusers layout. Data only, one file a part."""
