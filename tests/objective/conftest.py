from hypothesis import settings

# A busy machine is no failure: examples have no deadline.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
