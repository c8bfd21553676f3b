"""Labels with a certificate: proposed by imperfect teachers, checked, cleaned, and audited blind."""
