"""Problems, and sampling answers to them."""
