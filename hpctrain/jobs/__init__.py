"""Jobs on clusters: what a site's machine is like. Never imports TensorFlow."""
