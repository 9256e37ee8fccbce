"""The key of a run: whoever has it takes part in the run, and may run code in its processes."""

import datetime
import os
import ssl
import stat

_FOREVER = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31)


class SecretError(ValueError):
  """The file with a run's key is missing, is damaged, or could be read by others."""


class Secret:
  """A private key and its self-signed certificate, which all processes of a run share.

  A TLS context made of it trusts this one certificate and no other party.

  Attributes:
    certificate: in DER.
  """

  def __init__(self, path: str):
    """Reads the file that `make` has written. Raises SecretError."""
    self._path = path
    try:
      with open(path, encoding='ascii') as file:
        mode, owner = os.fstat(file.fileno()).st_mode, os.fstat(file.fileno()).st_uid
        self._pem = file.read()
    except (OSError, UnicodeError) as error:
      reason = error.strerror if isinstance(error, OSError) else 'it is not a text file'
      raise SecretError(f"the run's key, {path}, cannot be read: {reason}.") from error
    if stat.S_IMODE(mode) & 0o077:
      raise SecretError(
        f"the run's key, {path}, is open to other users (mode {stat.S_IMODE(mode):04o}): "
        f'`chmod 600 {path}`; or, if others may have read it, stop the run and delete the file, '
        'and the next start makes another.'
      )
    if owner not in (os.geteuid(), 0):
      raise SecretError(f"the run's key, {path}, belongs to another user; make a copy of your own.")
    try:
      begin = self._pem.index('-----BEGIN CERTIFICATE-----')
      self.certificate = ssl.PEM_cert_to_DER_cert(self._pem[begin:].strip())
      self._context(ssl.PROTOCOL_TLS_SERVER)
    except (ValueError, ssl.SSLError) as error:
      raise SecretError(
        f"the run's key, {path}, is damaged; copy it again, or delete it while the run is stopped, "
        'and the next start makes another.'
      ) from error

  def server_context(self) -> ssl.SSLContext:
    """Settings for the side that listens."""
    context = self._context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # every connection proves itself anew
    return context

  def client_context(self) -> ssl.SSLContext:
    """Settings for the side that connects."""
    return self._context(ssl.PROTOCOL_TLS_CLIENT)

  def _context(self, side: int) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is the run's, not a host's
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(self._path)
    context.load_verify_locations(cadata=self.certificate)
    return context


def new() -> bytes:
  """Makes the content of a file with a new key."""
  from cryptography import x509  # here: only the process that makes a key needs it
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  key = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'kip')])
  begin, end = _FOREVER  # hosts' clocks differ; a key ends when its file is deleted
  certificate = (
    x509.CertificateBuilder()
    .subject_name(name)
    .issuer_name(name)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(begin)
    .not_valid_after(end)
    .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  return key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
  ) + certificate.public_bytes(serialization.Encoding.PEM)


def make(path: str) -> None:
  """Writes a new key for a run, unless the file is there.

  Raises SecretError if it cannot be written.
  """
  content = new()
  try:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
  except FileExistsError:
    return
  except OSError as error:
    raise SecretError(f"the run's key, {path}, cannot be written: {error.strerror}.") from error
  with os.fdopen(descriptor, 'wb') as file:
    file.write(content)
