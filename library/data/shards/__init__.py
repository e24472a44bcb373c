"""Images in tar archives (WebDataset shards), found by a table beside them."""
