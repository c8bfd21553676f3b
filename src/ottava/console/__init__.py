"""What people look at: progress in the terminal, the report as JSON and as a page."""
