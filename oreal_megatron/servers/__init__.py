"""SGLang servers: their processes and states, the pool that updates them, and the routing of requests to them."""
