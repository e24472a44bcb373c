"""DreamBooth's measures of images that a model drew, by encoders from local folders."""
