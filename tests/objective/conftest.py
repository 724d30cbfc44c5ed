from hypothesis import settings

# A busy machine is no failure: examples have no deadline.
settings.register_profile("untimed", deadline=None, max_examples=30)
settings.load_profile("untimed")
