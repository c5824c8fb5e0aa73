"""What a run would need, predicted without the machines."""
