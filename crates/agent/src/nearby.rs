//! Finding devices on the same network that share models, without the hub: DNS-SD (RFC 6763) over
//! multicast DNS (RFC 6762).
//!
//! What is said aloud is an address and a short name of each file, which only those recognise who
//! know the file's digest already. What is heard is a hint: bytes need no trust.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use mdns_sd::{IfKind, Receiver, ServiceDaemon, ServiceEvent, ServiceInfo};
use slmops_artifact::Digest;

/// The service's type.
pub const SERVICE: &str = "_slm-model._tcp.local.";
/// The key of the files in its text record.
pub const FILES_KEY: &str = "files";
/// The most files that are announced; a string of a text record has 255 bytes.
const MAX_FILES: usize = 12;
/// The most neighbours that are remembered.
const MAX_NEIGHBOURS: usize = 64;
/// Bytes of a digest that make a short name.
const NAME_BYTES: usize = 8;

/// What is said and heard on the network of one address.
pub struct Nearby {
    daemon: ServiceDaemon,
    address: SocketAddr,
    /// A name that says nothing about the device, another one at each start.
    instance: String,
    announced: Option<BTreeSet<Digest>>,
    heard: Arc<Mutex<BTreeMap<String, Neighbour>>>,
    listening: tokio::task::JoinHandle<()>,
}

#[derive(Debug, PartialEq, Eq)]
struct Neighbour {
    address: SocketAddr,
    files: BTreeSet<String>,
}

impl Drop for Nearby {
    fn drop(&mut self) {
        self.listening.abort();
        // It says goodbye by itself.
        let _ = self.daemon.shutdown();
    }
}

impl Nearby {
    /// Listens on the network of `address`, where this device serves its files.
    ///
    /// # Errors
    /// A network without multicast.
    pub fn new(address: SocketAddr) -> mdns_sd::Result<Self> {
        let daemon = ServiceDaemon::new()?;
        daemon.disable_interface(IfKind::All)?;
        daemon.enable_interface(IfKind::Addr(address.ip()))?;
        let instance = format!("{:016x}", rand::random::<u64>());
        let heard = Arc::default();
        let listener = Listener {
            events: daemon.browse(SERVICE)?,
            own: format!("{instance}.{SERVICE}"),
            address: address.ip(),
            heard: Arc::clone(&heard),
        };
        let listening = tokio::spawn(listener.listen());
        Ok(Self { daemon, address, instance, announced: None, heard, listening })
    }

    /// Says that these files are to be had here. True where that is news.
    pub fn announce(&mut self, files: &BTreeSet<Digest>) -> bool {
        if self.announced.as_ref() == Some(files) {
            return false;
        }
        self.announced = Some(files.clone());
        let names: Vec<String> = files.iter().take(MAX_FILES).map(short_name).collect();
        let text = [(FILES_KEY, names.join(","))];
        let host = format!("{}.local.", self.instance);
        let (ip, port) = (self.address.ip(), self.address.port());
        let said = ServiceInfo::new(SERVICE, &self.instance, &host, ip, port, &text[..])
            .and_then(|service| self.daemon.register(service));
        if let Err(error) = said {
            tracing::debug!("cannot tell the network of models: {error}");
        }
        true
    }

    /// Where a file is to be had, as `http://ADDRESS:PORT`.
    pub fn who_has(&self, file: Digest) -> Vec<String> {
        let name = short_name(&file);
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let have = heard.values().filter(|neighbour| neighbour.files.contains(&name));
        have.map(|neighbour| format!("http://{}", neighbour.address)).collect()
    }
}

/// What makes neighbours of what is heard.
struct Listener {
    events: Receiver<ServiceEvent>,
    own: String,
    address: IpAddr,
    heard: Arc<Mutex<BTreeMap<String, Neighbour>>>,
}

impl Listener {
    async fn listen(self) {
        while let Ok(event) = self.events.recv_async().await {
            let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            match event {
                ServiceEvent::ServiceResolved(service) if service.fullname != self.own => {
                    let addresses = service.addresses.iter().map(|address| address.to_ip_addr());
                    let address = addresses.into_iter().find(|it| is_near(*it, self.address));
                    let files = service.txt_properties.get_property_val_str(FILES_KEY);
                    let room =
                        heard.len() < MAX_NEIGHBOURS || heard.contains_key(&service.fullname);
                    if let (Some(ip), Some(files), true) = (address, files, room) {
                        let files = files.split(',').take(MAX_FILES).map(str::to_owned).collect();
                        let address = SocketAddr::new(ip, service.port);
                        heard.insert(service.fullname.clone(), Neighbour { address, files });
                    }
                }
                ServiceEvent::ServiceRemoved(_, name) => drop(heard.remove(&name)),
                _ => {}
            }
        }
    }
}

/// A name of a file that whoever does not know its digest cannot make anything of.
pub fn short_name(file: &Digest) -> String {
    Digest::of(format!("nearby {file}").as_bytes()).hex()[..2 * NAME_BYTES].to_owned()
}

/// Whether an address that somebody on the network names is one of such a network: nobody sends this
/// device elsewhere. `own` is its own address.
fn is_near(address: IpAddr, own: IpAddr) -> bool {
    match address {
        _ if address.is_loopback() => own.is_loopback(),
        IpAddr::V4(address) => address.is_private() || address.is_link_local(),
        IpAddr::V6(address) => address.is_unique_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_sent_elsewhere() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (address, own, near) in [
            ("192.168.1.7", "192.168.1.2", true),
            ("10.0.0.7", "192.168.1.2", true),
            ("169.254.3.4", "192.168.1.2", true),
            ("fd00::7", "fd00::2", true),
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "192.168.1.2", false),
            ("8.8.8.8", "192.168.1.2", false),
            ("2001:db8::1", "fd00::2", false),
            ("fe80::1", "fd00::2", false),
        ] {
            assert_eq!(is_near(ip(address), ip(own)), near, "{address} from {own}");
        }
    }

    #[test]
    fn a_short_name_gives_no_digest_away() {
        let file = Digest::of(b"a model");
        assert_eq!(short_name(&file).len(), 16);
        assert!(!file.hex().contains(&short_name(&file)[..8]));
        assert_ne!(short_name(&file), short_name(&Digest::of(b"another one")));
    }
}
