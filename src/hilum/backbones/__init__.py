"""Image in, `Tokens` out. Imports only `hilum.core`."""
