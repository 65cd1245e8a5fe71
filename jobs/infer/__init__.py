"""The way in from somebody else's pipeline: `Infer`."""
