"""Numbers about artifacts and attributions; pure functions of arrays."""
