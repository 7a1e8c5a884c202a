"""Takes metrics as an OpenTelemetry collector does, decoded by PyPI `opentelemetry-proto`.

Prints its port, then a line of JSON for each push: its headers and what it says.
"""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        request = ExportMetricsServiceRequest()
        request.ParseFromString(body)
        # Whatever the decoder does not know would be lost on the way back.
        whole = len(request.SerializeToString()) == len(body)
        push = {
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "whole": whole,
            "request": MessageToDict(request),
        }
        print(json.dumps(push), flush=True)
        answer = ExportMetricsServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Collector)
print(server.server_address[1], flush=True)
server.serve_forever()
