"""What people look at: the table in the terminal, in Markdown and as CSV."""
