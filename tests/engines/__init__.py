"""What Ottava writes, loaded by other engines and compared by numbers."""
