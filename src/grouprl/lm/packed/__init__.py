"""Any transformer on one row of packed tokens: attention, low-precision products, the head."""
