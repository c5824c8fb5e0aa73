"""The audit: what the compiler made of every kernel, and what each one issues, on a machine without a GPU."""
