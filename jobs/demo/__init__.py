"""The embedded demo: a support-ticket task, and the small model that is trained for it."""
