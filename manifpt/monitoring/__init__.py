"""What changes between scans: drift, newcomers, alerts."""
