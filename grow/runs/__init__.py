"""Finished runs as models with losses, for whoever reports on them or fits laws to them."""
