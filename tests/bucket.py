"""A small stand-in for Google Cloud Storage's JSON interface, enough for gcsfs and TensorStore."""

import base64
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

_OBJECT = re.compile(r'(?:/download|/upload)?/storage/v1/b/([^/]+)/o(?:/(.*))?$')


class Bucket(http.server.ThreadingHTTPServer):
  """Serves objects from memory on a free port of this machine.

  Attributes:
    objects: name to (content, generation).
    requests: method and path of everything that was asked.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('localhost', 0), _Handler)
    self.objects, self.uploads, self.requests = {}, {}, []
    self.lock, self.numbers = threading.RLock(), itertools.count(1)
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def handle_error(self, request, client_address):
    pass  # clients are killed in the middle of what they ask

  @property
  def url(self) -> str:
    return f'http://localhost:{self.server_port}'

  def environment(self) -> dict[str, str]:
    """What sends the libraries here, without credentials."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'nobody',
      'GCE_METADATA_HOST': 'localhost:1',
    }

  def put(self, name: str, content: bytes) -> dict:
    with self.lock:
      self.objects[name] = content, next(self.numbers)
    return self.describe(name)

  def describe(self, name: str) -> dict:
    content, generation = self.objects[name]
    return {
      'kind': 'storage#object',
      'bucket': 'bucket',
      'name': name,
      'id': f'bucket/{name}/{generation}',
      'size': str(len(content)),
      'generation': str(generation),
      'metageneration': '1',
      'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(),
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'updated': '2026-01-01T00:00:00.000Z',
      'storageClass': 'STANDARD',
    }

  def listing(self, query: dict[str, str]) -> dict:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    names, prefixes = [], set()
    for name in sorted(self.objects):
      if not name.startswith(prefix) or name < query.get('startOffset', ''):
        continue
      if 'endOffset' in query and name >= query['endOffset']:
        continue
      head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, '', '')
      if cut:
        prefixes.add(prefix + head + cut)
      else:
        names.append(name)
    items = [self.describe(name) for name in names]
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *args):
    pass

  def _parts(self, path: str | None = None):
    url = urllib.parse.urlsplit(path or self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    found = _OBJECT.match(url.path)
    name = urllib.parse.unquote(found[2]) if found and found[2] else None
    return url.path, name, query

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') == 'chunked':
      parts = []
      while size := int(self.rfile.readline(), 16):
        parts.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b''.join(parts)
    return self.rfile.read(int(self.headers.get('Content-Length', 0)))

  def _send(self, status: int, content=b'', **headers: str) -> None:
    if not isinstance(content, bytes):
      content, headers = (
        json.dumps(content).encode(),
        headers | {'Content-Type': 'application/json'},
      )
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def _note(self, name: str | None) -> None:
    self.server.requests.append((self.command, self.path))

  def do_GET(self):
    path, name, query = self._parts()
    self._note(name)
    if name is None and '/o' in path:
      return self._send(200, self.server.listing(query))
    if name is None:
      return self._send(200, {'kind': 'storage#bucket', 'name': path.rsplit('/', 1)[-1]})
    if name not in self.server.objects:
      return self._send(404, {'error': {'code': 404, 'message': f'No such object: {name}'}})
    content, generation = self.server.objects[name]
    if query.get('ifGenerationNotMatch') == str(generation):
      return self._send(304)
    if query.get('alt') != 'media':
      return self._send(200, self.server.describe(name))
    head = {'x_goog_generation': str(generation), 'Content_Type': 'application/octet-stream'}
    asked = re.match(r'bytes=(\d*)-(\d*)$', self.headers.get('Range', ''))
    if not asked:
      return self._send(200, content, **head)
    start = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
    stop = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
    if start >= len(content):
      return self._send(416)
    head['Content_Range'] = f'bytes {start}-{stop - 1}/{len(content)}'
    self._send(206, content[start:stop], **head)

  def do_DELETE(self):
    _, name, _ = self._parts()
    self._note(name)
    gone = self.server.objects.pop(name, None)
    self._send(204 if gone else 404)

  def do_POST(self):
    path, name, query = self._parts()
    self._note(name)
    body = self._body()
    if path.startswith('/resumable'):
      return self._continue(body)
    if path.startswith('/batch'):
      return self._batch(body)
    if name and (verb := re.search('/(rewriteTo|moveTo)/(b/[^/]*/)?o/', name)):
      source, target = name[: verb.start()], name[verb.end() :]
      made = self.server.put(target, self.server.objects[source][0])
      if verb[1] == 'moveTo':
        del self.server.objects[source]
        return self._send(200, made)
      return self._send(200, {'done': True, 'resource': made})
    kind = query.get('uploadType')
    if kind == 'media':
      return self._put(query['name'], body, query)
    if kind == 'multipart':
      mark = (
        b'--' + re.search('boundary=[\'"]?([^\'";]+)', self.headers['Content-Type'])[1].encode()
      )
      about, content = (
        part.split(b'\n\n', 1) if b'\r\n\r\n' not in part else part.split(b'\r\n\r\n', 1)
        for part in body.split(mark)[1:3]
      )
      end = b'\r\n' if content[1].endswith(b'\r\n') else b'\n'
      return self._put(json.loads(about[1])['name'], content[1].removesuffix(end), query)
    number = str(next(self.server.numbers))
    self.server.uploads[number] = json.loads(body)['name'], b'', query
    self._send(200, {}, Location=f'{self.server.url}/resumable/{number}')

  def do_PUT(self):
    self._note(None)
    self._continue(self._body())

  def _continue(self, body: bytes) -> None:
    number = self.path.rsplit('/', 1)[-1].partition('?')[0]
    name, before, query = self.server.uploads[number]
    content = before + body
    self.server.uploads[number] = name, content, query
    whole = self.headers.get('Content-Range', '').rpartition('/')[2]
    if whole == '*':
      return self._send(308, Range=f'bytes=0-{len(content) - 1}')
    self._put(name, content, query)

  def _put(self, name: str, content: bytes, query: dict[str, str]) -> None:
    with self.server.lock:
      asked = query.get('ifGenerationMatch')
      if asked and int(asked) != self.server.objects.get(name, (b'', 0))[1]:
        return self._send(412, {'error': {'code': 412, 'message': 'conditionNotMet'}})
      self._send(200, self.server.put(name, content))

  def _batch(self, body: bytes) -> None:
    paths = re.findall(rb'DELETE (\S+) HTTP', body)
    for path in paths:
      self.server.objects.pop(self._parts(path.decode())[1], None)
    part = 'Content-Type: application/http\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n'
    answer = ''.join(f'--answer\r\n{part}\r\n' for _ in paths) + '--answer--'
    self._send(200, answer.encode(), Content_Type='multipart/mixed; boundary=answer')
