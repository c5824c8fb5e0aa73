"""What is done about a run that goes wrong, stands still, or is asked to stop."""
