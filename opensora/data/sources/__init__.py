"""Where videos come from: the readers of URIs, lists, archives, data sets of a hub, buckets, and fetching over HTTP."""
