"""What is measured, each script runnable by itself."""
