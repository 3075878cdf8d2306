"""What fingerprints say of their generators."""
