"""What `predict` writes: tables of predictions, embeddings, and copies of images in class folders."""
