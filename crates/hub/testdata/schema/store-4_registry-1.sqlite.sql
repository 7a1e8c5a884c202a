PRAGMA foreign_keys = OFF;
BEGIN;
CREATE TABLE schema_version (
                 component TEXT PRIMARY KEY,
                 version INTEGER NOT NULL
             ) STRICT;
CREATE TABLE devices (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        public_key TEXT NOT NULL UNIQUE,
        site TEXT,
        labels TEXT NOT NULL,
        facts TEXT NOT NULL,
        desired TEXT NOT NULL,
        report TEXT,
        report_sequence INTEGER NOT NULL DEFAULT 0,
        enrolled_at TEXT NOT NULL,
        last_seen TEXT NOT NULL,
        revoked INTEGER NOT NULL DEFAULT 0
    , orders TEXT) STRICT;
CREATE TABLE device_events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        device TEXT NOT NULL REFERENCES devices (id),
        at TEXT NOT NULL,
        generation INTEGER NOT NULL,
        what TEXT NOT NULL
    ) STRICT;
CREATE INDEX device_events_by_device ON device_events (device, sequence);
CREATE TABLE invitations (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        secret TEXT NOT NULL,
        info TEXT NOT NULL,
        used_by TEXT REFERENCES devices (id)
    ) STRICT;
CREATE TABLE classes (name TEXT PRIMARY KEY, class TEXT NOT NULL) STRICT;
CREATE TABLE blueprints (
        layer TEXT NOT NULL, name TEXT NOT NULL, toml TEXT NOT NULL, PRIMARY KEY (layer, name)
    ) STRICT;
CREATE TABLE releases (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        model TEXT NOT NULL,
        version TEXT NOT NULL,
        release TEXT NOT NULL,
        UNIQUE (model, version)
    ) STRICT;
CREATE TABLE rollouts (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL,
        final INTEGER NOT NULL,
        completed_sequence INTEGER,
        rollout TEXT NOT NULL
    ) STRICT;
CREATE INDEX rollouts_active ON rollouts (final, sequence);
CREATE TABLE quarantine (
        manifest TEXT NOT NULL, class TEXT NOT NULL, since TEXT, rollout TEXT, PRIMARY KEY (manifest, class)
    ) STRICT;
CREATE TABLE tokens (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        hash TEXT NOT NULL UNIQUE,
        token TEXT NOT NULL
    ) STRICT;
CREATE TABLE publisher_keys (id TEXT PRIMARY KEY, key TEXT NOT NULL) STRICT;
CREATE TABLE audit (
        sequence INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        object TEXT NOT NULL,
        details TEXT NOT NULL,
        previous TEXT NOT NULL,
        hash TEXT NOT NULL
    ) STRICT;
CREATE TABLE channels (name TEXT PRIMARY KEY, channel TEXT NOT NULL) STRICT;
CREATE TABLE webhooks (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        webhook TEXT NOT NULL,
        secret TEXT NOT NULL,
        cursor INTEGER NOT NULL
    ) STRICT;
CREATE TABLE webhook_deliveries (
        webhook TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        action TEXT NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        next_ms INTEGER NOT NULL,
        last TEXT NOT NULL,
        PRIMARY KEY (webhook, sequence)
    ) STRICT;
CREATE INDEX webhook_deliveries_by_state ON webhook_deliveries (webhook, state, sequence);
CREATE TABLE registry_repositories (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE
    ) STRICT;
CREATE TABLE registry_blobs (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_blobs_by_digest ON registry_blobs (digest);
CREATE TABLE registry_manifests (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        media_type TEXT NOT NULL,
        artifact_type TEXT,
        subject TEXT,
        annotations TEXT,
        content BLOB NOT NULL,
        pushed_at TEXT NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT;
CREATE INDEX registry_manifests_by_subject
        ON registry_manifests (repository, subject, digest) WHERE subject IS NOT NULL;
CREATE TABLE registry_references (
        repository INTEGER NOT NULL,
        manifest TEXT NOT NULL,
        target TEXT NOT NULL,
        PRIMARY KEY (repository, manifest, target),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_references_by_target ON registry_references (repository, target);
CREATE TABLE registry_tags (
        repository INTEGER NOT NULL,
        name TEXT NOT NULL,
        manifest TEXT NOT NULL,
        PRIMARY KEY (repository, name),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
CREATE INDEX registry_tags_by_manifest ON registry_tags (repository, manifest);
CREATE TABLE registry_uploads (
        id TEXT PRIMARY KEY,
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        started_at_s INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
INSERT INTO schema_version VALUES ('store',4);
INSERT INTO schema_version VALUES ('registry',1);
INSERT INTO devices VALUES ('d1','kitchen-pi','key of d1','berlin','{"room":"kitchen"}','{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}','{"generation":2,"model":{"model":"m","version":"1.0.0","variant":"q4_k_m","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","weights":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","size_bytes":7,"predicted_memory_bytes":9},"runtime":{"context_tokens":2048,"parallel":2,"threads":0,"batch_tokens":512,"kv_type":"f16","flash_attention":true,"queue_limit":64},"confirm_timeout_s":60,"reason":"test"}','{"sequence":3,"generation":2,"phase":"confirmed","rejected":[],"probes":[],"telemetry":{"requests":0,"errors":0,"prompt_tokens":0,"generated_tokens":0,"worker_crashes":0,"downloaded_bytes":0,"tokens_per_s":0.0,"time_to_first_token_ms":0.0,"worker_memory_bytes":0,"worker_peak_memory_bytes":0},"facts":{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}}',3,'2027-01-15T08:00:10Z','2027-01-15T08:00:30Z',0,'{"exclusion":{"reason":"it''s away","by":"token test","at":"2027-01-15T08:00:00Z"}}');
INSERT INTO devices VALUES ('d2','kitchen-pi-2','key of d2','berlin','{"room":"kitchen"}','{"hostname":"Kitchen Pi","arch":"aarch64","kernel":"Linux 6.1","cpu":"test","cpu_features":[],"cores":4,"memory_bytes":1073741824,"memory_budget_bytes":536870912,"disk_free_bytes":1073741824,"agent_version":"0.1.0","engine":"test"}','{"generation":1,"runtime":{"context_tokens":2048,"parallel":2,"threads":0,"batch_tokens":512,"kv_type":"f16","flash_attention":true,"queue_limit":64},"confirm_timeout_s":900,"reason":"no release is meant for this device yet"}',NULL,0,'2027-01-15T08:00:10Z','2027-01-15T08:00:10Z',1,NULL);
INSERT INTO device_events VALUES (1,'d1','2027-01-15T08:00:10Z',1,'joined by invitation i-d1');
INSERT INTO device_events VALUES (2,'d2','2027-01-15T08:00:10Z',1,'joined by invitation i-d2');
INSERT INTO device_events VALUES (3,'d1','2027-01-15T08:00:30Z',2,'confirmed: runs no model');
INSERT INTO device_events VALUES (4,'d2','2027-01-15T08:00:00Z',1,'shut out of the fleet');
INSERT INTO device_events VALUES (5,'d1','2027-01-15T08:00:00Z',1,'excluded by token test: it''s away');
INSERT INTO device_events VALUES (6,'d1','2027-01-15T08:00:00Z',2,'told to be m 1.0.0 (q4_k_m): test');
INSERT INTO sqlite_sequence VALUES ('invitations',3);
INSERT INTO sqlite_sequence VALUES ('device_events',6);
INSERT INTO sqlite_sequence VALUES ('webhooks',1);
INSERT INTO sqlite_sequence VALUES ('releases',2);
INSERT INTO sqlite_sequence VALUES ('rollouts',2);
INSERT INTO sqlite_sequence VALUES ('tokens',1);
INSERT INTO invitations VALUES (1,'i-d1','bd66bb2a4f3112ba0e97d693718f7e9df270782b1af7d2fae4a8f59d77e051f6','{"id":"i-d1","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}','d1');
INSERT INTO invitations VALUES (2,'i-d2','b1cce1284648b717c9b302682dad30f3dec1bfb0cfa17e977b420b2a5f0446a4','{"id":"i-d2","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}','d2');
INSERT INTO invitations VALUES (3,'i-open','395661c1b34d183fb4049ae64e557ae089d48434c45bd181e2a23e67b1480b59','{"id":"i-open","labels":{"room":"kitchen"},"site":"berlin","created_at":"2027-01-15T08:00:00Z","expires_at":"2027-01-15T08:16:40Z"}',NULL);
INSERT INTO classes VALUES ('small','{"name":"small","description":"","min_memory_bytes":0,"quantisation":"Q4_K_M"}');
INSERT INTO blueprints VALUES ('device','d1','model = "m" # it''s quoted: \ 
');
INSERT INTO releases VALUES (1,'m','1.0.0','{"model":"m","version":"1.0.0","original":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","key":"0123456789abcdef","variants":[{"name":"q4_k_m","classes":[],"quantisation":"Q4_K_M","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","weights":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","size_bytes":7,"repacked_bytes":0,"shape":{"architecture":"llama","parameters":1,"layers":1,"embedding":1,"feed_forward":1,"heads":1,"kv_heads":1,"key_width":1,"value_width":1,"vocabulary":1,"trained_context":128},"report":{"version":1,"subject":"sha256:78d8d603f68805aaed4f0f04b7411631251aa4d60bb9eaff7fefd6c4d70952a3","reference":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","suite":"sha256:f8ebd43dbef1f029bf4930c65c9b7c5cc76af476927cee861ff18fcc73bfc4ab","size_bytes":7,"perplexity":20.1234567890123,"kl_divergence":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"kl_p99":0.3,"top1_agreement":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"tasks":[],"decode_tokens_per_s":0.3333333333333333,"prompt_tokens_per_s":0.6666666666666666,"time_to_first_token_ms":0.30000000000000004,"peak_memory_bytes":1,"machine":{"cpu":"test","arch":"x86_64","cores":1,"memory_bytes":1,"kernel":"test","measured":"real"},"engine":"test","finished_at":"2027-01-15T08:00:00Z","chunk_nll":[2.345678901234567,1e-17],"chunk_kl":[]}}],"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}');
INSERT INTO releases VALUES (2,'m','1.1.0','{"model":"m","version":"1.1.0","original":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","key":"0123456789abcdef","variants":[{"name":"q4_k_m","classes":[],"quantisation":"Q4_K_M","manifest":"sha256:343efffcf3daa5fbaf4fa40310b6b2fed48ee002ba0474f14e3cb5fed207d490","weights":"sha256:d972240b2a6544baa90533fff913e9ef01b3a1fb7259fb6302a2a6736806ef74","size_bytes":7,"repacked_bytes":0,"shape":{"architecture":"llama","parameters":1,"layers":1,"embedding":1,"feed_forward":1,"heads":1,"kv_heads":1,"key_width":1,"value_width":1,"vocabulary":1,"trained_context":128},"report":{"version":1,"subject":"sha256:d972240b2a6544baa90533fff913e9ef01b3a1fb7259fb6302a2a6736806ef74","reference":"sha256:0682c5f2076f099c34cfdd15a9e063849ed437a49677e6fcc5b4198c76575be5","suite":"sha256:f8ebd43dbef1f029bf4930c65c9b7c5cc76af476927cee861ff18fcc73bfc4ab","size_bytes":7,"perplexity":20.1234567890123,"kl_divergence":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"kl_p99":0.3,"top1_agreement":{"mean":0.1,"low":0.05,"high":0.2,"samples":9},"tasks":[],"decode_tokens_per_s":0.3333333333333333,"prompt_tokens_per_s":0.6666666666666666,"time_to_first_token_ms":0.30000000000000004,"peak_memory_bytes":1,"machine":{"cpu":"test","arch":"x86_64","cores":1,"memory_bytes":1,"kernel":"test","measured":"real"},"engine":"test","finished_at":"2027-01-15T08:00:00Z","chunk_nll":[2.345678901234567,1e-17],"chunk_kl":[]}}],"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}');
INSERT INTO rollouts VALUES (1,'r1','completed',1,1,'{"rollout":{"id":"r1","model":"m","version":"1.0.0","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}},"state":"completed","current_wave":0,"waves":1,"devices":[],"decisions":[{"at":"2027-01-15T08:00:20Z","what":"created for m 1.0.0, 1 wave","because":["selector all means 0 devices; 0 can get it"]}],"waiting_for":"the first wave to start","created_at":"2027-01-15T08:00:20Z","created_by":"token test","updated_at":"2027-01-15T08:00:20Z"},"before":{},"forgiven":[]}');
INSERT INTO rollouts VALUES (2,'r2','running',0,NULL,'{"rollout":{"id":"r2","model":"m","version":"1.1.0","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}},"state":"running","current_wave":0,"waves":1,"devices":[],"decisions":[{"at":"2027-01-15T08:00:20Z","what":"created for m 1.1.0, 1 wave","because":["selector all means 0 devices; 0 can get it"]}],"waiting_for":"the first wave to start","created_at":"2027-01-15T08:00:20Z","created_by":"token test","updated_at":"2027-01-15T08:00:20Z"},"before":{},"forgiven":[]}');
INSERT INTO quarantine VALUES ('sha256:2f05d4b689d270cafb02285f35f44866f7dc8a2d368a3f9d1124373eeab31fb1','small','2027-01-15T08:00:00Z',NULL);
INSERT INTO tokens VALUES (1,'t1','628b49d96dcde97a430dd4f597705899e09a968f793491e4b704cae33a40dc02','{"id":"t1","name":"first","role":"admin","created_at":"2027-01-15T08:00:00Z"}');
INSERT INTO publisher_keys VALUES ('0123456789abcdef','{"id":"0123456789abcdef","name":"ci","public_key":"pem"}');
INSERT INTO audit VALUES (1,'2027-01-15T08:00:00Z','token test','invitation.create','i-d1','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:0000000000000000000000000000000000000000000000000000000000000000','sha256:f8cc845ca2ef1d5933f26e1bd6cefb756edadca7da6f60ddec58cb0033ee76bb');
INSERT INTO audit VALUES (2,'2027-01-15T08:00:10Z','device d1','device.enrol','d1','{"name":"kitchen-pi","invitation":"i-d1"}','sha256:f8cc845ca2ef1d5933f26e1bd6cefb756edadca7da6f60ddec58cb0033ee76bb','sha256:b2b62ffe5f4c308c31ded8c2e69fafc69cbfc2a83532cfeb2d5432fc5fd798db');
INSERT INTO audit VALUES (3,'2027-01-15T08:00:00Z','token test','invitation.create','i-d2','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:b2b62ffe5f4c308c31ded8c2e69fafc69cbfc2a83532cfeb2d5432fc5fd798db','sha256:34ab5477583be3cd2f975e2f8c1912b64f51052eea06aafd10a5ee7d6da2ffff');
INSERT INTO audit VALUES (4,'2027-01-15T08:00:10Z','device d2','device.enrol','d2','{"name":"kitchen-pi-2","invitation":"i-d2"}','sha256:34ab5477583be3cd2f975e2f8c1912b64f51052eea06aafd10a5ee7d6da2ffff','sha256:1d2990b894bc1b49d166a1a5ee864b5bcaabc4ee0c3c2925092ac3e64f07f0a1');
INSERT INTO audit VALUES (5,'2027-01-15T08:00:00Z','token test','invitation.create','i-open','{"labels":{"room":"kitchen"},"site":"berlin","expires_at":"2027-01-15T08:16:40Z"}','sha256:1d2990b894bc1b49d166a1a5ee864b5bcaabc4ee0c3c2925092ac3e64f07f0a1','sha256:50f9503e27c7351170ee10be920f5034ccae52a60142281ab1f0bada3ba8bb34');
INSERT INTO audit VALUES (6,'2027-01-15T08:00:00Z','token test','device.revoke','d2','{"name":"kitchen-pi-2"}','sha256:50f9503e27c7351170ee10be920f5034ccae52a60142281ab1f0bada3ba8bb34','sha256:2be2f81e029b6b02ad405071e62b9a3d7c793e49f68b34b9f16fec8da864d39b');
INSERT INTO audit VALUES (7,'2027-01-15T08:00:00Z','token test','device.exclude','d1','{"reason":"it''s away"}','sha256:2be2f81e029b6b02ad405071e62b9a3d7c793e49f68b34b9f16fec8da864d39b','sha256:0ec326a341d5a1dd69b04af86ecddd77d72543fb861abdbbd6ebc96b7dbdd1b3');
INSERT INTO audit VALUES (8,'2027-01-15T08:00:00Z','token test','class.put','small','{"min_memory_bytes":0,"quantisation":"Q4_K_M"}','sha256:0ec326a341d5a1dd69b04af86ecddd77d72543fb861abdbbd6ebc96b7dbdd1b3','sha256:2f708cd6a9aed6df09af2b7dc760c84ce49c1e623e19544abadd9d2aaaf222c5');
INSERT INTO audit VALUES (9,'2027-01-15T08:00:00Z','token test','channel.put','beta','{"after":null,"policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}}}','sha256:2f708cd6a9aed6df09af2b7dc760c84ce49c1e623e19544abadd9d2aaaf222c5','sha256:cc9de3cfa068a4b7a79e2c729f552a66781e25f44e756a0e65ffeec9dddc5dd9');
INSERT INTO audit VALUES (10,'2027-01-15T08:00:00Z','token test','webhook.create','w1','{"host":"example.com","events":["class.*"]}','sha256:cc9de3cfa068a4b7a79e2c729f552a66781e25f44e756a0e65ffeec9dddc5dd9','sha256:4ebb477294c8652f582b8fdc34fa9c0d956919aee1619df9347c4afc59c6bc35');
INSERT INTO audit VALUES (11,'2027-01-15T08:00:00Z','token test','webhook.test','w1','{}','sha256:4ebb477294c8652f582b8fdc34fa9c0d956919aee1619df9347c4afc59c6bc35','sha256:20a2fa5bdfbdf560fa03af0f33ba152518ae5fbdaadeb5351f99f0e2b4ca1e36');
INSERT INTO audit VALUES (12,'2027-01-15T08:00:00Z','token test','blueprint.put','device/d1','{"toml":"model = \"m\" # it''s quoted: \\ \n"}','sha256:20a2fa5bdfbdf560fa03af0f33ba152518ae5fbdaadeb5351f99f0e2b4ca1e36','sha256:2dbb26f055c57697b1d7f0f479cba02364f9eb1a50b6052e3ab133c29a27e555');
INSERT INTO audit VALUES (13,'2027-01-15T08:00:00Z','token test','release.create','m 1.0.0','{"variants":["q4_k_m sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5"],"key":"0123456789abcdef"}','sha256:2dbb26f055c57697b1d7f0f479cba02364f9eb1a50b6052e3ab133c29a27e555','sha256:a1dfcf3b086c2b9e5b7e29e0d5b6d7f1bca946b19fe92a3178b03e225ccdab28');
INSERT INTO audit VALUES (14,'2027-01-15T08:00:00Z','token test','release.create','m 1.1.0','{"variants":["q4_k_m sha256:343efffcf3daa5fbaf4fa40310b6b2fed48ee002ba0474f14e3cb5fed207d490"],"key":"0123456789abcdef"}','sha256:a1dfcf3b086c2b9e5b7e29e0d5b6d7f1bca946b19fe92a3178b03e225ccdab28','sha256:92e2c52414fc94716db2872a9a059fdf8af1b3c256d6e52ddf8bfc8c2aac07e2');
INSERT INTO audit VALUES (15,'2027-01-15T08:00:00Z','hub','rollout.decide','r1','{"what":"created for m 1.0.0, 1 wave","because":["selector all means 0 devices; 0 can get it"],"state":"completed"}','sha256:92e2c52414fc94716db2872a9a059fdf8af1b3c256d6e52ddf8bfc8c2aac07e2','sha256:138425003515e70d8af0152d8354e00052c84e5bdaf8df12c2a06dba6b56064e');
INSERT INTO audit VALUES (16,'2027-01-15T08:00:00Z','hub','device.assign','d1','{"generation":2,"model":"m 1.0.0","variant":"q4_k_m","manifest":"sha256:d863b65747fd524e55ac57805152e4e46a58caeb99c01443d0dd89d93cc8acd5","reason":"test"}','sha256:138425003515e70d8af0152d8354e00052c84e5bdaf8df12c2a06dba6b56064e','sha256:378086ac49362d3c72e705a6e725a9296b3b090bedb705000e79433ae99a5867');
INSERT INTO audit VALUES (17,'2027-01-15T08:00:00Z','hub','manifest.quarantine','sha256:2f05d4b689d270cafb02285f35f44866f7dc8a2d368a3f9d1124373eeab31fb1','{"class":"small","rollout":null}','sha256:378086ac49362d3c72e705a6e725a9296b3b090bedb705000e79433ae99a5867','sha256:e74fd5d5807a8d95fb8e8f5cc5c81943a47a6cb1a9cc8f4e2fa30d68c13bae61');
INSERT INTO audit VALUES (18,'2027-01-15T08:00:00Z','hub','rollout.decide','r2','{"what":"created for m 1.1.0, 1 wave","because":["selector all means 0 devices; 0 can get it"],"state":"running"}','sha256:e74fd5d5807a8d95fb8e8f5cc5c81943a47a6cb1a9cc8f4e2fa30d68c13bae61','sha256:4defd8bbba676682e06a53ae2d3d92da85c0374b8a09d9deeaa4623115dc2b6a');
INSERT INTO audit VALUES (19,'2027-01-15T08:00:00Z','token test','token.create','t1','{"name":"first","role":"admin","expires_at":null}','sha256:4defd8bbba676682e06a53ae2d3d92da85c0374b8a09d9deeaa4623115dc2b6a','sha256:9fd3524d04331b2571d2fa0b117f0f10994ba507b4520520e6002bc96092b05d');
INSERT INTO audit VALUES (20,'2027-01-15T08:00:00Z','token test','key.add','0123456789abcdef','{"name":"ci"}','sha256:9fd3524d04331b2571d2fa0b117f0f10994ba507b4520520e6002bc96092b05d','sha256:8164e2f7e8b6f3d14d917b6861ad5cbcc546e4120a04f2b9c01ae59298faa8eb');
INSERT INTO channels VALUES ('beta','{"name":"beta","policy":{"selector":"all","waves":[{"count":1},"rest"],"per":"fleet","max_failures":0,"bake_s":0,"confirm_timeout_s":900,"schedule":{},"limits":{},"approvals":[],"stragglers":{"away_after_s":604800,"unheard":"fail"}}}');
INSERT INTO webhooks VALUES (1,'w1','{"asked":{"url":"https://example.com/hook?key=hidden","events":["class.*"],"retry":{"attempts":20,"first_delay_ms":5000,"max_delay_ms":3600000,"timeout_ms":10000}},"created_at":"2027-01-15T08:00:00Z","created_by":"token test"}','whsec_qSYx9mN05vsE5leceZKVtrQq7C01amqvmLXDY0QEnZ0=',11);
INSERT INTO webhook_deliveries VALUES ('w1',11,'webhook.test','pending',0,1800000040000,'');
INSERT INTO registry_repositories VALUES (1,'models/m');
INSERT INTO registry_blobs VALUES (1,'sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c',7);
INSERT INTO registry_manifests VALUES (1,'sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc','a/b','c/d','sha256:a9491f4c1bf7b0cffbadcba2db8f028e4b3f2867cb59e1f3a0bc1968f3c51242','{}',X'7B202269742773223A20225C20FF000A22207D','now');
INSERT INTO registry_references VALUES (1,'sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc','sha256:9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c');
INSERT INTO registry_tags VALUES (1,'v1','sha256:28c37e865ae0fe66de1145571ff0ebe75a643ad19f483ecb56b4282be66547cc');
INSERT INTO registry_uploads VALUES ('up',1,1);
COMMIT;
