"""Any transformer on one row of packed tokens: packing, attention, low-precision products and the head."""
