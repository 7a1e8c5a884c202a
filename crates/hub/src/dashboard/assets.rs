//! The embedded files, each with its media type and entity tag.

use std::sync::LazyLock;

use slmops_artifact::Digest;

/// One embedded file.
pub struct Asset {
    /// Its path below `/assets/`.
    pub path: &'static str,
    /// Its `Content-Type`.
    pub media_type: &'static str,
    /// Its bytes.
    pub bytes: &'static [u8],
    /// Its quoted entity tag, from its content.
    pub etag: String,
}

macro_rules! embed {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!("assets/", $path)))),+]
    };
}

const FILES: &[(&str, &[u8])] = embed![
    "api.js",
    "chart.js",
    "components.css",
    "dom.js",
    "format.js",
    "index.html",
    "layout.css",
    "live.js",
    "logo.svg",
    "main.js",
    "model.js",
    "pages/audit.js",
    "pages/channels.js",
    "pages/device.js",
    "pages/fleet.js",
    "pages/held.js",
    "pages/release.js",
    "pages/releases.js",
    "pages/rollout.js",
    "pages/rollouts.js",
    "pages/webhooks.js",
    "theme.css",
    "theme.js",
    "ui.js",
];

static ASSETS: LazyLock<Vec<Asset>> = LazyLock::new(|| {
    let asset = |&(path, bytes): &(&'static str, &'static [u8])| Asset {
        path,
        media_type: media_type(path),
        bytes,
        etag: format!("\"{}\"", &Digest::of(bytes).hex()[..32]),
    };
    FILES.iter().map(asset).collect()
});

/// Every embedded file.
#[cfg(test)]
pub fn all() -> &'static [Asset] {
    &ASSETS
}

/// The file at this path below `/assets/`.
pub fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}

/// The one document that all pages share.
pub fn document() -> &'static Asset {
    find("index.html").expect("index.html is embedded")
}

fn media_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}
