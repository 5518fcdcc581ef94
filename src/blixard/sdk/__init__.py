"""What a user's program imports: an application, its jobs, and handles to what was submitted."""
