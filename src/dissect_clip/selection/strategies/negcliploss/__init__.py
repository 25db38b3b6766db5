"""negCLIPLoss: CLIPScore minus a normaliser over random sub-batches."""
