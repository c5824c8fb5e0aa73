"""The processes of a run: how they meet, share the model and its work, and notice what becomes of each other."""
