# SPDX-License-Identifier: Apache-2.0
"""An authority, and certificates of it for hosts, made by the openssl program."""
import os
import subprocess


def _openssl(directory, *words):
    subprocess.run(["openssl", *words], cwd=directory, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


class Authority:
    def __init__(self, directory):
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        _openssl(directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                 "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority")

    def certify(self, name, address):
        """The keys of [migration] for a host with this address."""
        with open(os.path.join(self.directory, f"{name}.ext"), "w") as file:
            file.write(f"subjectAltName=IP:{address}\n")
        _openssl(self.directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                 "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        _openssl(self.directory, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                 "-CAcreateserial", "-out", f"{name}.pem", "-days", "1", "-extfile", f"{name}.ext")
        return {"tls_cert": f"{self.directory}/{name}.pem", "tls_key": f"{self.directory}/{name}.key",
                "tls_ca": f"{self.directory}/ca.pem"}
