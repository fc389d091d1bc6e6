"""The trained model as a product: the only inference path."""
