"""The lesson: small worlds in which every claim of the papers can be seen."""
