"""HTTP around the routes: who may ask, how much and for how long, errors as documents, logs and metrics."""
