"""Networks: private stem, lent trunk, private heads."""
